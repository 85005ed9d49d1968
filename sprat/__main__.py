"""``python -m sprat`` is the command ``sprat``."""

from sprat.cli.main import main

if __name__ == "__main__":
    main()
