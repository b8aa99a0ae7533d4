"""Tests of the IR and its views."""
