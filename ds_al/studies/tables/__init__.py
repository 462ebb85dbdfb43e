"""Tables of all studies: ``write`` turns columns and rows into a table, one file per study declares its columns."""
