"""`python -m adaptface.cli`."""

from adaptface.cli import main

if __name__ == "__main__":
    main()
