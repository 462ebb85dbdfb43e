"""Tables of all studies: ``write`` builds tables from columns and rows; one file per study declares its columns."""
