"""`python -m fedpace` is the `fedpace` command."""

from fedpace.cli import main

if __name__ == "__main__":
    main()
