/* TCP over the loopback interface, IPv4 and IPv6: connections, data, ends, errors. */
#include "check.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/uio.h>

static struct sockaddr_storage address;
static socklen_t length;

static void loopback(int family) {
    memset(&address, 0, sizeof address);
    if (family == AF_INET) {
        struct sockaddr_in *v4 = (void *)&address;
        v4->sin_family = AF_INET;
        v4->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        length = sizeof *v4;
    } else {
        struct sockaddr_in6 *v6 = (void *)&address;
        v6->sin6_family = AF_INET6;
        v6->sin6_addr = in6addr_loopback;
        length = sizeof *v6;
    }
}

static int port_of(const struct sockaddr_storage *of) {
    return ntohs(of->ss_family == AF_INET ? ((struct sockaddr_in *)of)->sin_port : ((struct sockaddr_in6 *)of)->sin6_port);
}

static const char *host_of(const struct sockaddr_storage *of) {
    static char text[INET6_ADDRSTRLEN];
    return inet_ntop(of->ss_family,
                     of->ss_family == AF_INET ? (void *)&((struct sockaddr_in *)of)->sin_addr
                                              : (void *)&((struct sockaddr_in6 *)of)->sin6_addr,
                     text, sizeof text);
}

/* Opens a listening socket on a free port and leaves its address in `address`. */
static int listen_on(int family, int backlog) {
    loopback(family);
    int fd = MUST(socket(family, SOCK_STREAM, 0));
    MUST(bind(fd, (void *)&address, length));
    MUST(listen(fd, backlog));
    socklen_t size = sizeof address;
    MUST(getsockname(fd, (void *)&address, &size));
    return fd;
}

static int client(void) {
    int fd = MUST(socket(address.ss_family, SOCK_STREAM, 0));
    MUST(connect(fd, (void *)&address, length));
    return fd;
}

static void show_error(int fd) {
    int error = -1;
    socklen_t size = sizeof error;
    CALL(getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size));
    printf("pending error: %s\n", error ? error_name(error) : "none");
}

static uint32_t checksum(uint32_t sum, const unsigned char *bytes, size_t count) {
    for (size_t i = 0; i < count; i++)
        sum = (sum ^ bytes[i]) * 16777619u;
    return sum;
}

static void *send_much(void *argument) {
    int fd = (int)(long)argument;
    static unsigned char block[50000];
    uint32_t state = 1, sum = 2166136261u;
    for (int round = 0; round < 200; round++) {
        for (size_t i = 0; i < sizeof block; i++) {
            state = state * 1664525 + 1013904223;
            block[i] = (unsigned char)(state >> 24);
        }
        sum = checksum(sum, block, sizeof block);
        for (size_t done = 0; done < sizeof block;)
            done += MUST(send(fd, block + done, sizeof block - done, MSG_NOSIGNAL));
    }
    shutdown(fd, SHUT_WR);
    return (void *)(long)sum;
}

static void *echo(void *argument) {
    int fd = (int)(long)argument;
    char buffer[256];
    for (ssize_t count; (count = read(fd, buffer, sizeof buffer)) > 0;)
        write(fd, buffer, count);
    close(fd);
    return NULL;
}

static void exchange(int family) {
    char buffer[256] = "";
    struct sockaddr_storage peer, own;
    socklen_t size;

    printf("== IPv%d\n", family == AF_INET ? 4 : 6);
    section("connecting");
    int server = listen_on(family, 16);
    int fd = DONE(socket(family, SOCK_STREAM | SOCK_CLOEXEC, IPPROTO_TCP));
    CALL(connect(fd, (void *)&address, length));
    CALL(connect(fd, (void *)&address, length));
    size = sizeof peer;
    int accepted = DONE(accept4(server, (void *)&peer, &size, SOCK_NONBLOCK));
    SHOW(size == length);
    size = sizeof own;
    CALL(getsockname(fd, (void *)&own, &size));
    SHOW(port_of(&own) == port_of(&peer));
    printf("%s\n", host_of(&peer));
    size = sizeof peer;
    CALL(getpeername(fd, (void *)&peer, &size));
    SHOW(port_of(&peer) == port_of(&address));
    size = 4;
    CALL(getpeername(fd, (void *)&peer, &size));
    SHOW(size == length);

    section("data");
    CALL(read(accepted, buffer, 10));
    CALL(write(fd, "hello", 5));
    struct pollfd entry = {accepted, POLLIN | POLLOUT, 0};
    CALL(poll(&entry, 1, 5000));
    while (!(entry.revents & POLLIN))
        poll(&entry, 1, 100);
    SHOW(entry.revents == (POLLIN | POLLOUT));
    CALL(recv(accepted, buffer, 3, MSG_PEEK));
    int available;
    CALL(ioctl(accepted, FIONREAD, &available));
    SHOW(available);
    CALL(recv(accepted, buffer, sizeof buffer, 0));
    printf("%s\n", buffer);
    CALL(send(accepted, "back", 4, MSG_NOSIGNAL));
    CALL(recv(fd, buffer, 4, MSG_WAITALL));
    CALL(recv(fd, buffer, 4, MSG_DONTWAIT));
    struct iovec vectors[2] = {{"ab", 2}, {"cde", 3}};
    struct msghdr message = {.msg_iov = vectors, .msg_iovlen = 2};
    CALL(sendmsg(fd, &message, 0));
    CALL(recv(accepted, buffer, 1, 0) == -1 && errno == EAGAIN ? (poll(&entry, 1, 5000), read(accepted, buffer, 1)) : 1);
    char rest[4];
    struct iovec into[2] = {{rest, 2}, {rest + 2, 2}};
    message = (struct msghdr){.msg_iov = into, .msg_iovlen = 2};
    CALL(recvmsg(accepted, &message, 0));
    SHOW(message.msg_flags);
    printf("%.4s\n", rest);
    CALL(sendto(fd, "x", 1, 0, (void *)&address, length));
    CALL(lseek(fd, 0, SEEK_SET));
    CALL(pread(fd, buffer, 1, 0));

    section("half closed");
    CALL(shutdown(fd, SHUT_WR));
    CALL(write(fd, "x", 1));
    entry.events = POLLIN | POLLRDHUP;
    CALL(poll(&entry, 1, 5000));
    fcntl(accepted, F_SETFL, 0);
    CALL(read(accepted, buffer, 1));
    CALL(read(accepted, buffer, 1));
    entry.revents = 0;
    CALL(poll(&entry, 1, 5000));
    SHOW((entry.revents & (POLLIN | POLLRDHUP)) == (POLLIN | POLLRDHUP));
    CALL(write(accepted, "late", 4));
    CALL(recv(fd, buffer, 4, MSG_WAITALL));
    close(accepted);
    CALL(read(fd, buffer, 1));
    CALL(shutdown(fd, 99));
    close(fd);

    section("much");
    fd = client();
    accepted = MUST(accept(server, NULL, NULL));
    pthread_t thread;
    pthread_create(&thread, NULL, send_much, (void *)(long)fd);
    static unsigned char block[30000];
    uint32_t sum = 2166136261u;
    long total = 0;
    for (ssize_t count; (count = read(accepted, block, sizeof block)) > 0; total += count)
        sum = checksum(sum, block, count);
    void *sent;
    pthread_join(thread, &sent);
    SHOW(total);
    SHOW(sum == (uint32_t)(long)sent);
    close(fd), close(accepted);

    section("reset");
    fd = client();
    accepted = MUST(accept(server, NULL, NULL));
    struct linger at_once = {1, 0};
    CALL(setsockopt(accepted, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once));
    close(accepted);
    entry = (struct pollfd){fd, POLLIN, 0};
    CALL(poll(&entry, 1, 5000));
    SHOW((entry.revents & (POLLERR | POLLHUP)) == (POLLERR | POLLHUP));
    CALL(read(fd, buffer, 1));
    CALL(read(fd, buffer, 1));
    CALL(send(fd, "x", 1, MSG_NOSIGNAL));
    close(fd);
    for (int lingers = 0; lingers < 2; lingers++) {
        section("data before a reset");
        fd = client();
        accepted = MUST(accept(server, NULL, NULL));
        if (lingers)
            MUST(setsockopt(accepted, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once));
        else
            CALL(send(fd, "never read", 10, 0));
        CALL(send(accepted, "last", 4, 0));
        close(accepted);
        entry = (struct pollfd){fd, POLLIN, 0};
        CALL(poll(&entry, 1, 5000));
        SHOW((entry.revents & (POLLERR | POLLHUP)) == (POLLERR | POLLHUP));
        CALL(read(fd, buffer, 10));
        CALL(read(fd, buffer, 10));
        CALL(read(fd, buffer, 10));
        close(fd);
    }

    section("without blocking");
    fd = MUST(socket(family, SOCK_STREAM | SOCK_NONBLOCK, 0));
    entry = (struct pollfd){fd, POLLOUT, 0};
    int result = connect(fd, (void *)&address, length);
    printf("connect: %s\n", result == 0 || errno == EINPROGRESS ? "done or in progress" : error_name(errno));
    CALL(poll(&entry, 1, 5000));
    SHOW(entry.revents);
    show_error(fd);
    accepted = MUST(accept(server, NULL, NULL));
    memset(block, 0, sizeof block);
    long written = 0;
    for (ssize_t count; (count = write(fd, block, sizeof block)) > 0;)
        written += count;
    printf("full: %s\n", error_name(errno));
    CALL(poll(&entry, 1, 0));
    long drained = 0;
    while (drained < written)
        drained += MUST(read(accepted, block, sizeof block));
    CALL(poll(&entry, 1, 5000));
    SHOW(entry.revents);
    close(fd), close(accepted);
    fcntl(server, F_SETFL, O_NONBLOCK);
    CALL(accept(server, NULL, NULL));

    section("nobody there");
    int port_holder = listen_on(family, 1);
    close(port_holder);
    fd = MUST(socket(family, SOCK_STREAM, 0));
    CALL(connect(fd, (void *)&address, length));
    show_error(fd);
    close(fd);
    fd = MUST(socket(family, SOCK_STREAM | SOCK_NONBLOCK, 0));
    result = connect(fd, (void *)&address, length);
    printf("connect: %s\n",
           result == -1 && (errno == EINPROGRESS || errno == ECONNREFUSED) ? "in progress or refused" : "?");
    close(fd);
    close(server);
}

int main(void) {
    char buffer[16];
    signal(SIGPIPE, SIG_IGN);
    exchange(AF_INET);
    exchange(AF_INET6);

    printf("== both\n");
    section("addresses in use");
    int server = listen_on(AF_INET, 4);
    int other = MUST(socket(AF_INET, SOCK_STREAM, 0));
    CALL(bind(other, (void *)&address, length));
    int one = 1;
    CALL(setsockopt(other, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one));
    CALL(bind(other, (void *)&address, length));
    CALL(bind(server, (void *)&address, length));
    ((struct sockaddr_in *)&address)->sin_addr.s_addr = htonl(0xcb007101); /* 203.0.113.1, for documentation */
    CALL(bind(other, (void *)&address, length));
    CALL(bind(other, (void *)&address, 4));
    close(other), close(server);

    section("quick reuse of a port");
    loopback(AF_INET);
    server = MUST(socket(AF_INET, SOCK_STREAM, 0));
    MUST(setsockopt(server, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one));
    MUST(bind(server, (void *)&address, length));
    MUST(listen(server, 4));
    socklen_t own_size = sizeof address;
    MUST(getsockname(server, (void *)&address, &own_size));
    int fd = client();
    int accepted = MUST(accept(server, NULL, NULL));
    close(accepted);
    CALL(read(fd, buffer, 1));
    close(fd), close(server);
    server = MUST(socket(AF_INET, SOCK_STREAM, 0));
    MUST(setsockopt(server, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one));
    CALL(bind(server, (void *)&address, length));
    CALL(listen(server, 4));
    close(server);

    section("dual stack");
    int v6 = MUST(socket(AF_INET6, SOCK_STREAM, 0));
    int only = 0;
    CALL(setsockopt(v6, IPPROTO_IPV6, IPV6_V6ONLY, &only, sizeof only));
    struct sockaddr_in6 any = {.sin6_family = AF_INET6};
    CALL(bind(v6, (void *)&any, sizeof any));
    CALL(listen(v6, 4));
    socklen_t size = sizeof any;
    CALL(getsockname(v6, (void *)&any, &size));
    loopback(AF_INET);
    ((struct sockaddr_in *)&address)->sin_port = any.sin6_port;
    fd = client();
    struct sockaddr_storage peer;
    size = sizeof peer;
    accepted = DONE(accept(v6, (void *)&peer, &size));
    printf("%s\n", host_of(&peer));
    CALL(write(fd, "4", 1));
    CALL(read(accepted, buffer, 1));
    close(fd), close(accepted), close(v6);

    section("wrong calls");
    fd = MUST(socket(AF_INET, SOCK_STREAM, 0));
    CALL(read(fd, buffer, 1));
    CALL(send(fd, "x", 1, MSG_NOSIGNAL));
    CALL(accept(fd, NULL, NULL));
    CALL(getpeername(fd, (void *)&peer, &size));
    CALL(shutdown(fd, SHUT_RDWR));
    CALL(connect(fd, (void *)&any, 2));
    CALL(socket(AF_INET, SOCK_STREAM, IPPROTO_UDP));
    CALL(socket(AF_INET, 77, 0));
    CALL(socket(77, SOCK_STREAM, 0));
    CALL(socketpair(AF_INET, SOCK_STREAM, 0, (int[2]){0, 0}));
    CALL(listen(0, 1) == -1 ? -1 : 0);
    CALL(listen(99, 1));
    close(fd);

    section("accept wakes");
    server = listen_on(AF_INET, 128);
    int set = MUST(epoll_create1(0));
    struct epoll_event event = {.events = EPOLLIN | EPOLLET};
    MUST(epoll_ctl(set, EPOLL_CTL_ADD, server, &event));
    int clients[64];
    for (int i = 0; i < 64; i++)
        clients[i] = client();
    CALL(epoll_wait(set, &event, 1, 5000));
    fcntl(server, F_SETFL, O_NONBLOCK);
    int count = 0;
    pthread_t threads[64];
    while (count < 64) {
        accepted = accept(server, NULL, NULL);
        if (accepted >= 0)
            pthread_create(&threads[count++], NULL, echo, (void *)(long)accepted);
        else
            pause_for(MILLISECOND);
    }
    SHOW(count);
    int right = 0;
    for (int round = 0; round < 10; round++)
        for (int i = 0; i < 64; i++) {
            char text[8] = "", reply[8] = "";
            snprintf(text, sizeof text, "%d:%d", round, i);
            MUST(write(clients[i], text, sizeof text));
            MUST(recv(clients[i], reply, sizeof reply, MSG_WAITALL));
            right += strcmp(text, reply) == 0;
        }
    SHOW(right);
    for (int i = 0; i < 64; i++)
        close(clients[i]);
    for (int i = 0; i < 64; i++)
        pthread_join(threads[i], NULL);
    CALL(accept(server, NULL, NULL));

    section("a server that closes with connections waiting");
    fd = client();
    close(server);
    CALL(read(fd, buffer, 1));
    return finish();
}
