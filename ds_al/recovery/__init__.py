"""Recovery of one stage: keepers replace its process, which runs the script again from what the stage has saved."""
