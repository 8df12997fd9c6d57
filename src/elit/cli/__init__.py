"""The `elit` command: one thin module a command, parsing and printing only."""
