"""How the neurons of other libraries map to the fused ones; one module for each library, imported only beside it."""
