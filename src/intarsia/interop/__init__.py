"""Interop: other libraries' files and interfaces."""
