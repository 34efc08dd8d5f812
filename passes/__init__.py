"""The passes, one per file: the file name is the name on the command line, the class is its CamelCase.

This folder is installed as ``vitq_compiler.passes``. Imported as plain ``passes`` (which running from the root of the
repository would allow) every pass class would exist twice and ``isinstance`` would lie, so that is refused.
"""

if __name__ != "vitq_compiler.passes":
    raise ImportError(f"this package is vitq_compiler.passes, not {__name__}: write `from vitq_compiler.passes.<file> import <Class>`")
