"""Bridges from qtensor to other projects. Each is a package of its own and imports that project only when used."""
