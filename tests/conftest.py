"""What all tests share. Before anything imports torch: small models are fastest on one thread."""
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
