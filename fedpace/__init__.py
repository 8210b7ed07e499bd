"""fedpace: federated learning for fleets whose devices do not keep the same pace."""

import os

# grpcio would offer TLS 1.2 too; with only this 1.2 suite, which no P-256 key can serve, TLS 1.3 is what is left.
# It is read when grpc is first imported, so it is set before anything of ours can do that.
os.environ.setdefault("GRPC_SSL_CIPHER_SUITES", "ECDHE-RSA-AES128-GCM-SHA256")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

__version__ = "0.1.0"
