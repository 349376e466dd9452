"""A package of its own, with its own pyproject.toml; its module is also imported from here."""
