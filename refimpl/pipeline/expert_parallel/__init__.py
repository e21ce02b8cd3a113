"""Expert parallelism, emulated: experts over ranks and nodes, tokens to them and back.  SPEC XPAR-1 to -12.

placement     which rank has which expert, which node has which rank
dispatch      where the tokens of a batch go, on which path, and how many
permutation   the rows that a rank sends, receives and computes, in the order of public kernels
layouts       those rows as grouped GEMMs read them: padded, masked, in blocks
combine       results back into the slots of the tokens, and their sum
traffic       bytes over the network between nodes and over the links inside of a node
sharded       the model's own experts, each rank computing only what it has
"""
