"""Recipes as TOML files, read by `vitq_compiler.recipe`."""
