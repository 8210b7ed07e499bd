"""Both halves of an app are loaded and run to their end, whatever their code does, and how they ended is said."""

from __future__ import annotations

import random
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from safetensors.numpy import save_file

from fedpace.errors import AppError
from fedpace.hosting.app import AppFolder, load_app_folder
from fedpace.hosting.clientapp import AppFailure, run_clientapp
from fedpace.hosting.flower import ErrorCode, load_client_app, load_server_app, make_context
from fedpace.hosting.outputs import Outputs
from fedpace.hosting.serverapp import Ending, run_serverapp
from tests.inline_grid import RUN_ID, InlineGrid

MakeApp = Callable[..., AppFolder]

PYPROJECT = """
[project]
name = "an-app"
version = "1"
[tool.flwr.app]
publisher = "somebody"
[tool.flwr.app.components]
serverapp = "{module}:server"
clientapp = "{module}:client"
"""

APP = """
import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()

@client.train()
def train(message, context):
    return Message(RecordDict({"arrays": message.content["arrays"], "m": MetricRecord({"num-examples": 1})}), reply_to=message)

@server.main()
def main(grid, context):
    MAIN
"""

START = 'FedAvg(fraction_evaluate=0.0).start(grid, ArrayRecord({"w": Array(np.zeros(2))}), num_rounds=1)'


@pytest.fixture
def make_app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeApp]:
    """Writes app folders, each with a module of its own, which are forgotten afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def make(main: str = "pass", code: str = APP, module: str = "an_app") -> AppFolder:
        sys.modules.pop("an_app", None)
        folder = tmp_path / f"app{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / "pyproject.toml").write_text(PYPROJECT.format(module=module))
        main = textwrap.indent(textwrap.dedent(main), "    ").strip()
        (folder / "an_app.py").write_text(code.replace("MAIN", main))
        return load_app_folder(folder)

    yield make
    sys.modules.pop("an_app", None)


def run(app: AppFolder, out: Path, **options: Any) -> Ending:
    outputs = Outputs(out)
    grid = InlineGrid(load_client_app(app))
    options = {"run_id": RUN_ID, "run_config": {}, "seed": 5, "seconds": lambda: 0.0, **options}
    return run_serverapp(app, grid, outputs, **options)


# ---------------------------------------------------------------- the ServerApp


def test_a_serverapp_runs_to_its_end(make_app: MakeApp, tmp_path: Path) -> None:
    app = make_app(START)
    calls: list[str] = []
    ending = run(app, tmp_path / "out", ready=lambda: calls.append("ready"))
    assert (ending.status, ending.reason, ending.traceback) == ("finished", "", "")
    assert (ending.watch.versions, ending.watch.folded, calls) == (1, 2, ["ready"])
    assert (tmp_path / "out" / "model.safetensors").exists(), "what was written is on the disk by then"


def test_an_app_without_a_strategy_ends_with_a_warning(
    make_app: MakeApp, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ending = run(make_app("pass"), tmp_path / "out")
    assert (ending.status, ending.watch.seen, ending.watch.final) == ("finished", False, None)
    assert "the app used no Flower strategy: there are no final metrics and no model file" in caplog.text


@pytest.mark.parametrize(
    ("main", "reason"),
    [
        ('raise ValueError("no good")', "ValueError: no good"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt: "),
    ],
)
def test_a_serverapp_that_raises_or_exits_failed_with_its_own_traceback(
    make_app: MakeApp, tmp_path: Path, main: str, reason: str
) -> None:
    ending = run(make_app(main), tmp_path / "out")
    assert (ending.status, ending.reason) == ("failed", reason)
    assert "an_app.py" in ending.traceback and "hosting/serverapp.py" not in ending.traceback


def test_a_run_that_is_stopped_is_interrupted(make_app: MakeApp, tmp_path: Path) -> None:
    stop = "from fedpace.hosting.flower import RunNotRunningException\nraise RunNotRunningException"
    ending = run(make_app(stop), tmp_path / "out")
    assert (ending.status, ending.reason, ending.traceback) == ("interrupted", "the server was told to stop", "")


def test_a_configuration_error_needs_no_traceback(make_app: MakeApp, tmp_path: Path) -> None:
    save_file({"other": np.zeros(2)}, tmp_path / "model.safetensors")
    ending = run(make_app(START), tmp_path / "out", initial_model=tmp_path / "model.safetensors")
    assert ending.status == "failed" and ending.traceback == ""
    assert "--initial-model does not fit the app's model: array 'w' is missing in the file" in ending.reason
    ending = run(make_app("pass"), tmp_path / "out2", initial_model=tmp_path / "model.safetensors")
    assert "--initial-model cannot be used: the app starts no strategy with a model of its own" in ending.reason


def test_a_model_that_cannot_be_written_fails_the_run(
    make_app: MakeApp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(outputs: Outputs) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Outputs, "close", full)
    ending = run(make_app("pass"), tmp_path / "out")
    assert ending.status == "failed"
    assert ending.reason.startswith("the model could not be written to") and "No space left" in ending.reason


def test_a_serverapp_starts_from_the_same_randomness(make_app: MakeApp, tmp_path: Path) -> None:
    draw = "import random\nraise ValueError(f'{random.random()} {np.random.random()}')"
    app = make_app(draw)
    noise = lambda: (random.random(), np.random.random())  # what waiting for devices may draw meanwhile
    reasons = [run(app, tmp_path / str(n), seed=seed, ready=noise).reason for n, seed in enumerate((5, 5, 6))]
    assert reasons[0] == reasons[1] != reasons[2]


# ---------------------------------------------------------------- loading


def test_the_halves_of_an_app_are_loaded(make_app: MakeApp) -> None:
    app = make_app()
    assert isinstance(load_client_app(app), ClientApp) and isinstance(load_server_app(app), ServerApp)
    assert sys.path[0] == str(app.directory)
    load_client_app(app)
    assert sys.path.count(str(app.directory)) == 1


def test_a_wrong_reference_is_an_app_error(make_app: MakeApp) -> None:
    with pytest.raises(AppError, match="has no module 'an_app_missing', which 'an_app_missing:server' names"):
        load_server_app(make_app(module="an_app_missing"))
    with pytest.raises(AppError, match="an_app"):
        load_server_app(make_app(code="client = 1"))
    with pytest.raises(AppError, match=r"'an_app:server' in .* is a ClientApp, not a ServerApp"):
        load_server_app(make_app(code="from flwr.clientapp import ClientApp\nserver = ClientApp()"))


@pytest.mark.parametrize(
    ("code", "error"), [("import an_app_dependency", ModuleNotFoundError), ("1 / 0", ZeroDivisionError)]
)
def test_what_the_apps_own_code_raises_passes_through(make_app: MakeApp, code: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        load_client_app(make_app(code=code))


# ---------------------------------------------------------------- the ClientApp


def ask(handler: Callable[[Message, Context], Any]) -> Message | AppFailure:
    app = ClientApp()
    app.train()(handler)
    grid = InlineGrid(app)
    message = grid.create_message(RecordDict(), "train", 100, "1")
    context = make_context(RUN_ID, 100, {}, {}, RecordDict())
    return run_clientapp(app, message, context)


def test_a_reply_is_handed_on() -> None:
    reply = ask(lambda message, context: Message(RecordDict(), reply_to=message))
    assert isinstance(reply, Message) and reply.has_content()


def raises(error: BaseException) -> Callable[[Message, Context], Any]:
    def handler(message: Message, context: Context) -> Any:
        raise error

    return handler


@pytest.mark.parametrize(
    ("handler", "code", "reason"),
    [
        (raises(ValueError("no good")), ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "ValueError: no good"),
        (raises(SystemExit(3)), ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "SystemExit: 3"),
        (lambda *_: "text", ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "the ClientApp returned a str, not a Message"),
        (lambda *_: None, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "the ClientApp returned a NoneType, not a Message"),
        (lambda message, _: Message(Error(42, "too tired"), reply_to=message), 42, "too tired"),
    ],
)
def test_whatever_else_it_does_is_a_failure(handler: Any, code: int, reason: str) -> None:
    failure = ask(handler)
    assert isinstance(failure, AppFailure)
    assert (failure.code, failure.reason) == (code, reason)
    assert ("Traceback" in failure.traceback) == (": " in reason)


def test_a_message_of_a_type_the_app_does_not_know_is_a_failure() -> None:
    app = ClientApp()
    message = InlineGrid(app).create_message(RecordDict(), "query", 100, "1")
    failure = run_clientapp(app, message, make_context(RUN_ID, 100, {}, {}, RecordDict()))
    assert isinstance(failure, AppFailure) and "query" in failure.reason
