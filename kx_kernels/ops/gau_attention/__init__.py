"""Gated attention by squared relu; its derivation is in the README beside this file."""
