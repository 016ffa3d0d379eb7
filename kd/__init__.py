"""The machinery below the stages. It imports no script."""
