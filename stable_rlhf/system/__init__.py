"""What belongs to the machine around the package: locks on folders, servers over HTTP."""
