"""`repagen app`: a page that draws a pipeline's classes or prompts, alone or beside another model or adapter."""
