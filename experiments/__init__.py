"""Recipes, and the scripts that run them and make their tables."""
