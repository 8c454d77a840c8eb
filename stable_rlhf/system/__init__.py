"""What belongs to the machine around the package: installed extras, locks on folders, servers over HTTP."""
