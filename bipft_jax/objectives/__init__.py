"""Objectives, one file each, and their table."""
