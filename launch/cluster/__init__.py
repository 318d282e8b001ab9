"""Start, watch and stop the ranks on the hosts of a hostfile."""
