"""Entry file of a model repository: the pipeline itself comes with the installed library."""

from repagen import ClassToImagePipeline as ClassToImagePipeline
