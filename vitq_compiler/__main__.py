"""``python -m vitq_compiler`` is ``vitq-compile``."""

from vitq_compiler.cli import PROGRAM, main

if __name__ == "__main__":
    main(prog_name=PROGRAM)
