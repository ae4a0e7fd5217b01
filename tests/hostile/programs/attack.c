// What a hostile app asks of the kernel, one attempt a run: "attack NAME [ARGUMENT]" prints "ok", or the name of the
// error that stopped it. "ok" is what must not be seen.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <mqueue.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/ipc.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static const char *argument = "";

static long keyctl_(void) { return syscall(SYS_keyctl, 0 /* KEYCTL_GET_KEYRING_ID */, -3, 1); }
static long add_key_(void) { return syscall(SYS_add_key, "user", "left", "CANARY", 7, -4); }  // the uid's keyring
static long request_key_(void) {
    long r = syscall(SYS_request_key, "user", "left", NULL, -4);
    return r < 0 && errno == ENOKEY ? 0 : r;  // it was allowed to ask
}
static long bpf_(void) {
    union bpf_attr attr = {.map_type = BPF_MAP_TYPE_ARRAY, .key_size = 4, .value_size = 4, .max_entries = 1};
    return syscall(SYS_bpf, BPF_MAP_CREATE, &attr, sizeof attr);
}
static long io_uring(void) {
    char params[120] = {0};
    return syscall(SYS_io_uring_setup, 1, params);
}
static long userfaultfd_(void) { return syscall(SYS_userfaultfd, O_CLOEXEC | 1 /* UFFD_USER_MODE_ONLY */); }
static long perf(void) {
    char attr[128] = {0};
    attr[0] = 1;  // software
    *(uint32_t *)(attr + 4) = sizeof attr;
    attr[40] = 0x60;  // without the kernel and the hypervisor
    return syscall(SYS_perf_event_open, attr, 0, -1, -1, 0);
}
static long vsock(void) { return socket(AF_VSOCK, SOCK_STREAM, 0); }
static long packet(void) { return socket(AF_PACKET, SOCK_RAW, 0); }
static long alg(void) { return socket(AF_ALG, SOCK_SEQPACKET, 0); }
static long raw(void) { return socket(AF_INET, SOCK_RAW, 1); }
static long raw_cloexec(void) { return socket(AF_INET6, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, 58); }
static long key_socket(void) { return socket(AF_KEY, SOCK_RAW, 2); }
static long tiocsti(void) {
    for (int fd = 0; fd < 3; fd++)
        if (ioctl(fd, TIOCSTI, "x") == 0) return 0;
    return -1;
}
static long tiocsti_high(void) {  // the kernel looks at 32 bits alone
    for (int fd = 0; fd < 3; fd++)
        if (syscall(SYS_ioctl, (long)fd, 0x100000000UL | TIOCSTI, "x") == 0) return 0;
    return -1;
}
static long tioclinux(void) {
    char paste = 3;
    return ioctl(0, TIOCLINUX, &paste);
}
static long traced_child(void) {
    pid_t child = fork();
    if (child == 0) {
        pause();
        _exit(0);
    }
    long r = ptrace(PTRACE_ATTACH, child, NULL, NULL);
    int failure = errno;
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    errno = failure;
    return r;
}
static long traced_other(void) { return ptrace(PTRACE_ATTACH, atoi(argument), NULL, NULL); }
static long read_other(void) {
    char byte;
    static char there;
    struct iovec here = {&byte, 1}, far = {&there, 1};
    return process_vm_readv(atoi(argument), &here, 1, &far, 1, 0);
}
static long read_own(void) {
    char byte;
    static char there;
    struct iovec here = {&byte, 1}, far = {&there, 1};
    return process_vm_readv(getpid(), &here, 1, &far, 1, 0);
}
static long signal_other(void) { return kill(atoi(argument), SIGKILL); }
static long signal_all(void) { return kill(-1, SIGKILL); }
static long unshare_user(void) { return unshare(CLONE_NEWUSER); }
static long clone_user(void) {
    long pid = syscall(SYS_clone, CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0);
    if (pid == 0) _exit(0);
    return pid;
}
static long clone3_user(void) {
    uint64_t args[11] = {CLONE_NEWUSER, 0, 0, 0, SIGCHLD};
    long pid = syscall(SYS_clone3, args, sizeof args);
    if (pid == 0) _exit(0);
    return pid;
}
static long unshare_mount(void) { return unshare(CLONE_NEWNS); }
static long unshare_net(void) { return unshare(CLONE_NEWNET); }
static long setns_(void) {
    int fd = open("/proc/self/ns/mnt", O_RDONLY);  // that of process 1, too; not to be opened is no answer of setns
    return fd < 0 ? -1 : setns(fd, 0);
}
static long mount_tmpfs(void) { return mount("none", "/tmp", "tmpfs", 0, NULL); }
static long mount_cgroup(void) { return mount("none", "/tmp", "cgroup", 0, "memory"); }
static long mount_cgroup2(void) { return mount("none", "/tmp", "cgroup2", 0, NULL); }
static long remount(void) { return mount(NULL, "/", NULL, MS_REMOUNT | MS_BIND, NULL); }
static long unmount(void) { return umount2("/proc", MNT_DETACH); }
static long pivot(void) { return syscall(SYS_pivot_root, "/tmp", "/tmp"); }
static long chroot_(void) { return chroot("/tmp"); }
static long fsopen_(void) { return syscall(430, "tmpfs", 0); }
static long open_tree_(void) { return syscall(428, AT_FDCWD, "/", 1 /* OPEN_TREE_CLONE */); }
static long mount_setattr_(void) {
    uint64_t attr[4] = {0, 1 /* MOUNT_ATTR_RDONLY */, 0, 0};
    return syscall(442, AT_FDCWD, "/", 0, attr, sizeof attr);
}
static long by_handle(void) {
    struct {
        struct file_handle head;
        unsigned char bytes[8];
    } handle = {.head = {8, 1}};
    handle.bytes[0] = 2;  // the root of an ext4
    int place = open("/", O_RDONLY | O_DIRECTORY);
    return open_by_handle_at(place, &handle.head, O_RDONLY);
}
static long kexec(void) { return syscall(SYS_kexec_load, 0, 0, NULL, 0); }
static long module(void) { return syscall(SYS_init_module, "", 0, ""); }
static long finit_module_(void) { return syscall(SYS_finit_module, open("/proc/self/exe", O_RDONLY), "", 0); }
static long setuid_root(void) { return setuid(0); }
static long setgid_root(void) { return setgid(0); }
static long groups(void) {
    gid_t group = 0;
    return syscall(SYS_setgroups, 1, &group);
}
static long device(void) { return mknod("/tmp/device", S_IFBLK | 0666, 0x0800); }
static long hostname(void) { return sethostname("mine", 4); }
static long reboot_(void) { return syscall(SYS_reboot, 0xfee1dead, 672274793, 0 /* CAD_OFF */, NULL); }
static long swapon_(void) { return syscall(SYS_swapon, "/tmp/swap", 0); }
static long acct_(void) { return syscall(SYS_acct, "/tmp/acct"); }
static long kernel_log(void) {
    char text[16];
    return syscall(SYS_syslog, 3, text, sizeof text);
}
static long set_clock(void) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return clock_settime(CLOCK_REALTIME, &now);
}
static long priority(void) {
    struct sched_param first = {.sched_priority = 1};
    return sched_setscheduler(0, SCHED_FIFO, &first);
}
// --- what an app may plant for the next one of its uid, and what that one looks for

static long shm_key = 0x626c6f63;
static long plant_shm(void) {
    int id = shmget(shm_key, 4096, IPC_CREAT | 0666);
    char *memory = id < 0 ? (char *)-1 : shmat(id, NULL, 0);
    if (memory == (char *)-1) return -1;
    strcpy(memory, "CANARY");
    return 0;
}
static long find_shm(void) {
    int id = shmget(shm_key, 0, 0);
    char *memory = id < 0 ? (char *)-1 : shmat(id, NULL, SHM_RDONLY);
    if (memory == (char *)-1) return -1;
    puts(memory);
    return 0;
}
static long plant_queue(void) {
    mqd_t queue = mq_open("/left", O_RDWR | O_CREAT, 0666, NULL);
    return queue < 0 ? -1 : mq_send(queue, "CANARY", 7, 0);
}
static long find_queue(void) { return mq_open("/left", O_RDONLY); }
static long find_key(void) {
    char text[16] = "";
    long key = syscall(SYS_keyctl, 10 /* KEYCTL_SEARCH */, -4, "user", "left", -2);  // linked to: then it can be read
    if (key < 0 || syscall(SYS_keyctl, 11 /* KEYCTL_READ */, key, text, sizeof text) < 0) return -1;
    puts(text);
    return 0;
}
static long drop_keys(void) { return syscall(SYS_keyctl, 7 /* KEYCTL_CLEAR */, -4); }
static long drop_queue(void) { return mq_unlink("/left"); }

// --- bombs

static long descriptors(void) {  // how many can be open; never more than the limit
    int count = 0;
    while (open("/dev/null", O_RDONLY) >= 0) count++;
    printf("%d ", count);
    return -1;
}
static long files(void) {  // empty ones, wherever a file costs no space
    char name[64];
    for (long made = 0;; made++) {
        snprintf(name, sizeof name, made % 2 ? "/tmp/%ld" : "/dev/shm/%ld", made);
        int file = open(name, O_CREAT | O_WRONLY, 0600);
        if (file < 0) {
            printf("%ld ", made);
            return -1;
        }
        close(file);
    }
}
static long swarm(void) {  // tiny processes, each a grandchild in a session of its own; the last ones stay
    int wanted = atoi(argument), lasting = 100;
    signal(SIGTERM, SIG_IGN);
    signal(SIGINT, SIG_IGN);
    for (int made = 0; made < wanted; made += 2) {
        pid_t child = fork();
        if (child < 0) {
            usleep(1000);
            made -= 2;
            continue;
        }
        if (child == 0) {
            setsid();
            signal(SIGHUP, SIG_IGN);
            if (fork() == 0 && wanted - made <= 2 * lasting) sleep(600);
            _exit(0);
        }
        waitpid(child, NULL, 0);
    }
    return 0;
}
static long stopped(void) {  // processes that a signal, once sent, does not reach before they go on
    for (int i = 0; i < 5; i++)
        if (fork() == 0) {
            setsid();
            raise(SIGSTOP);
            sleep(600);
        }
    return 0;
}

static const struct {
    const char *name;
    long (*attempt)(void);
} attempts[] = {
    {"keyctl", keyctl_}, {"add_key", add_key_}, {"request_key", request_key_}, {"bpf", bpf_}, {"io_uring", io_uring},
    {"userfaultfd", userfaultfd_}, {"perf_event_open", perf}, {"AF_VSOCK", vsock}, {"AF_PACKET", packet},
    {"AF_ALG", alg}, {"AF_KEY", key_socket}, {"raw", raw}, {"raw_cloexec", raw_cloexec}, {"TIOCSTI", tiocsti},
    {"TIOCSTI_high", tiocsti_high}, {"TIOCLINUX", tioclinux}, {"ptrace_child", traced_child},
    {"ptrace", traced_other}, {"process_vm_readv", read_other}, {"process_vm_readv_own", read_own},
    {"kill", signal_other}, {"kill_all", signal_all}, {"unshare_user", unshare_user}, {"clone_user", clone_user},
    {"clone3_user", clone3_user}, {"unshare_mount", unshare_mount}, {"unshare_net", unshare_net}, {"setns", setns_},
    {"mount_tmpfs", mount_tmpfs}, {"mount_cgroup", mount_cgroup}, {"mount_cgroup2", mount_cgroup2},
    {"remount", remount}, {"umount", unmount}, {"pivot_root", pivot}, {"chroot", chroot_}, {"fsopen", fsopen_},
    {"open_tree", open_tree_}, {"mount_setattr", mount_setattr_}, {"open_by_handle_at", by_handle},
    {"kexec_load", kexec}, {"init_module", module}, {"finit_module", finit_module_}, {"setuid", setuid_root},
    {"setgid", setgid_root}, {"setgroups", groups}, {"mknod", device}, {"sethostname", hostname},
    {"reboot", reboot_}, {"swapon", swapon_}, {"acct", acct_}, {"syslog", kernel_log}, {"clock_settime", set_clock},
    {"realtime", priority}, {"plant_shm", plant_shm}, {"find_shm", find_shm}, {"plant_queue", plant_queue},
    {"find_queue", find_queue}, {"drop_queue", drop_queue}, {"descriptors", descriptors}, {"files", files}, {"swarm", swarm},
    {"stopped", stopped}, {"find_key", find_key}, {"drop_keys", drop_keys},
};

int main(int argc, char **argv) {
    if (geteuid() == 0) {
        fputs("these are for workers: as root they would hurt\n", stderr);
        return 2;
    }
    if (argc > 2) argument = argv[2];
    for (size_t i = 0; argc > 1 && i < sizeof attempts / sizeof *attempts; i++) {
        if (strcmp(argv[1], attempts[i].name)) continue;
        if (attempts[i].attempt() >= 0) return puts("ok") < 0;
        return printf("%s\n", strerrorname_np(errno)) < 0;
    }
    fprintf(stderr, "no such attempt\n");
    return 2;
}
