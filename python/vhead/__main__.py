"""`python -m vhead` is the command `vhead`."""

from vhead.cli import main

if __name__ == "__main__":
    main()
