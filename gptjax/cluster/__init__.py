"""Where a command runs: on processes of this host, or given to a cluster's own scheduler."""
