"""What a configuration costs under a recipe, computed: bytes of parameters and of what backward keeps."""
