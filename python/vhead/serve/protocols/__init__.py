"""What clients speak: a module for each protocol, and the forms of bodies that they have in common."""
