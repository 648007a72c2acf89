"""FLASH's mixed-chunk attention; its derivation is in the README beside this file."""
