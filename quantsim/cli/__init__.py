"""The command line, ``quantsim`` or ``python -m quantsim``: a file a command, and what commands share."""
