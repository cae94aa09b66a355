"""`repagen app`: a page that draws images of a pipeline's classes, alone or beside another model or adapter."""
