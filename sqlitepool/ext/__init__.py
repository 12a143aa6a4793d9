"""The edges: one module for each server or framework, imported only where that is installed."""
