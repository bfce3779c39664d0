"""The commands of `emma-hf`, a module for each group.

`add_commands` adds a group's parsers. Each sets the defaults `run`, which runs the parsed arguments, and, where the
parser cannot see every mistake, `check_arguments`, which finds the others without importing torch or Transformers.
"""
