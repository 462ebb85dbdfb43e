"""Launch of ranks on this machine."""
