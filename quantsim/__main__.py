"""``python -m quantsim``."""

from quantsim.cli.main import program

if __name__ == "__main__":
    program()
