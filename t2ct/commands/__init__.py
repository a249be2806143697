"""One module per command of `t2ct`: `add_parser` declares its arguments, `run` does it and imports what that needs."""
