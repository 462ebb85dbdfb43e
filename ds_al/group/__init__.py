"""Stages of a group, which one AL layer spans: their computation, and the instructions that they execute."""
