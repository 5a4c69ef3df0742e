"Set before torch is imported: one thread, no bars, no windows"
import os

os.environ.update(OMP_NUM_THREADS='1', TQDM_DISABLE='1', MPLBACKEND='Agg')
os.environ.pop('IN_TEST', None) # with it set, nbdev exports nothing
