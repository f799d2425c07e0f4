"""The page that shows runs, and the document that it is made of. Needs the standard library and numpy alone."""
