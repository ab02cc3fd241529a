"""Files that ship with the package: the tiny policy of the quickstart."""
