"""Tests of tncompile."""
