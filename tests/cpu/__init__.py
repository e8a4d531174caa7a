"""Tests that run anywhere."""
