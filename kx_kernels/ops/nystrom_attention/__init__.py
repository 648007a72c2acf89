"""Nyström landmark attention; its derivation is in the README beside this file."""
