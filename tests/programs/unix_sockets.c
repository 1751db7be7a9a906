/* Unix sockets: streams, datagrams, packets, names, descriptors and credentials that travel. */
#include "check.h"
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <stddef.h>

static struct sockaddr_un named(const char *path, socklen_t *length) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    size_t bytes = path[0] == '@' ? strlen(path) : strlen(path) + 1;
    memcpy(address.sun_path, path, bytes);
    if (path[0] == '@')
        address.sun_path[0] = 0;
    *length = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + bytes);
    return address;
}

static void stream(const char *name) {
    char buffer[64] = "";
    socklen_t length, size;
    struct sockaddr_un address = named(name, &length), peer;
    int server = MUST(socket(AF_UNIX, SOCK_STREAM, 0));
    CALL(bind(server, (void *)&address, length));
    CALL(listen(server, 4));
    int client = MUST(socket(AF_UNIX, SOCK_STREAM, 0));
    CALL(connect(client, (void *)&address, length));
    size = sizeof peer;
    int accepted = DONE(accept(server, (void *)&peer, &size));
    SHOW(size);
    SHOW(peer.sun_family == AF_UNIX);
    size = sizeof peer;
    CALL(getpeername(client, (void *)&peer, &size));
    SHOW(size == length);
    CALL(write(client, "hello", 5));
    CALL(write(client, "again", 5));
    CALL(read(accepted, buffer, sizeof buffer));
    CALL(shutdown(client, SHUT_WR));
    CALL(read(accepted, buffer, 1));
    CALL(write(accepted, "bye", 3));
    CALL(read(client, buffer, 64));
    close(accepted);
    CALL(read(client, buffer, 64));
    CALL(send(client, "x", 1, MSG_NOSIGNAL));
    int other = MUST(socket(AF_UNIX, SOCK_STREAM, 0));
    CALL(bind(other, (void *)&address, length));
    close(server);
    CALL(connect(other, (void *)&address, length));
    close(other), close(client);
}

static void send_descriptor(int over, int fd) {
    char byte = 'd', space[CMSG_SPACE(sizeof(int))] = "";
    struct iovec vector = {&byte, 1};
    struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1, .msg_control = space, .msg_controllen = sizeof space};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(header), &fd, sizeof fd);
    CALL(sendmsg(over, &message, 0));
}

static int receive_descriptor(int over) {
    char byte, space[CMSG_SPACE(sizeof(int))];
    struct iovec vector = {&byte, 1};
    struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1, .msg_control = space, .msg_controllen = sizeof space};
    CALL(recvmsg(over, &message, MSG_CMSG_CLOEXEC));
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    if (!header)
        return -1;
    SHOW(header->cmsg_type == SCM_RIGHTS);
    int fd;
    memcpy(&fd, CMSG_DATA(header), sizeof fd);
    return fd;
}

static void *write_much(void *argument) {
    char block[1000] = "";
    for (int i = 0; i < 2000; i++)
        for (size_t done = 0; done < sizeof block;)
            done += MUST(write((int)(long)argument, block + done, sizeof block - done));
    close((int)(long)argument);
    return NULL;
}

int main(void) {
    char buffer[4000] = "";
    int pair[2];
    socklen_t length, size;
    signal(SIGPIPE, SIG_IGN);
    enter_work_directory();

    section("streams by path");
    stream("socket");
    struct stat status;
    CALL(stat("socket", &status));
    SHOW(S_ISSOCK(status.st_mode));
    CALL(open("socket", O_RDWR));
    section("streams by abstract name");
    stream("@kiln-differential");

    section("wrong names");
    struct sockaddr_un address = named("none", &length);
    int fd = MUST(socket(AF_UNIX, SOCK_STREAM, 0));
    CALL(connect(fd, (void *)&address, length));
    address = named("@nobody-listens-here", &length);
    CALL(connect(fd, (void *)&address, length));
    close(MUST(open("file", O_CREAT | O_RDWR, 0600)));
    address = named("file", &length);
    CALL(connect(fd, (void *)&address, length));
    CALL(bind(fd, (void *)&address, length));
    address = named("none/none", &length);
    CALL(bind(fd, (void *)&address, length));
    CALL(bind(fd, (void *)&address, 300));
    CALL(accept(fd, NULL, NULL));
    close(fd);

    section("datagrams");
    struct sockaddr_un to = named("@kiln-datagrams", &length), from;
    int receiver = MUST(socket(AF_UNIX, SOCK_DGRAM, 0));
    CALL(bind(receiver, (void *)&to, length));
    int sender = MUST(socket(AF_UNIX, SOCK_DGRAM, 0));
    CALL(sendto(sender, "one", 3, 0, (void *)&to, length));
    CALL(sendto(sender, "three", 5, 0, (void *)&to, length));
    size = sizeof from;
    CALL(recvfrom(receiver, buffer, 100, 0, (void *)&from, &size));
    SHOW(size);
    CALL(recv(receiver, buffer, 2, MSG_TRUNC));
    CALL(recv(receiver, buffer, 2, MSG_DONTWAIT));
    CALL(connect(sender, (void *)&to, length));
    CALL(send(sender, "connected", 9, 0));
    CALL(read(receiver, buffer, 100));
    close(receiver);
    CALL(send(sender, "x", 1, 0));
    close(sender);

    section("packets");
    CALL(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair));
    CALL(write(pair[0], "one", 3));
    CALL(write(pair[0], "three", 5));
    CALL(read(pair[1], buffer, 2));
    CALL(read(pair[1], buffer, 100));
    close(pair[0]);
    CALL(read(pair[1], buffer, 100));
    close(pair[1]);

    section("pairs");
    CALL(socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
    CALL(write(pair[0], "across", 6));
    CALL(recv(pair[1], buffer, 3, MSG_PEEK));
    CALL(recv(pair[1], buffer, 100, 0));
    CALL(recv(pair[1], buffer, 100, MSG_DONTWAIT));
    struct ucred credentials;
    size = sizeof credentials;
    CALL(getsockopt(pair[0], SOL_SOCKET, SO_PEERCRED, &credentials, &size));
    SHOW(credentials.pid == getpid() && credentials.uid == getuid() && credentials.gid == getgid());

    section("descriptors that travel");
    int pipes[2];
    MUST(pipe(pipes));
    send_descriptor(pair[0], pipes[1]);
    close(pipes[1]);
    int travelled = receive_descriptor(pair[1]);
    SHOW(travelled >= 0);
    CALL(fcntl(travelled, F_GETFD));
    CALL(write(travelled, "by the way", 10));
    close(travelled);
    CALL(read(pipes[0], buffer, 100));
    CALL(read(pipes[0], buffer, 100));
    send_descriptor(pair[0], 999);
    CALL(write(pair[0], "n", 1));
    SHOW(receive_descriptor(pair[1]));
    close(pair[0]), close(pair[1]);

    section("much");
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
    pthread_t thread;
    pthread_create(&thread, NULL, write_much, (void *)(long)pair[0]);
    long total = 0;
    for (ssize_t count; (count = read(pair[1], buffer, sizeof buffer)) > 0;)
        total += count;
    SHOW(total);
    pthread_join(thread, NULL);
    close(pair[1]);

    section("types");
    int type;
    size = sizeof type;
    MUST(socketpair(AF_UNIX, SOCK_DGRAM, 0, pair));
    CALL(getsockopt(pair[0], SOL_SOCKET, SO_TYPE, &type, &size));
    SHOW(type);
    CALL(getsockopt(pair[0], SOL_SOCKET, SO_DOMAIN, &type, &size));
    SHOW(type);
    CALL(socket(AF_UNIX, SOCK_STREAM, 5));
    return finish();
}
