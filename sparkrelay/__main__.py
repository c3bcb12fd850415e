"""`python -m sparkrelay` is the command `sparkrelay`."""

from sparkrelay.cli import main

if __name__ == "__main__":
    main()
