/* UDP over the loopback interface: datagrams, their bounds, connected sockets, errors. */
#include "check.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

static int open_on(int family, struct sockaddr_storage *address, socklen_t *length) {
    memset(address, 0, sizeof *address);
    address->ss_family = (sa_family_t)family;
    if (family == AF_INET)
        ((struct sockaddr_in *)address)->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    else
        ((struct sockaddr_in6 *)address)->sin6_addr = in6addr_loopback;
    *length = family == AF_INET ? sizeof(struct sockaddr_in) : sizeof(struct sockaddr_in6);
    int fd = MUST(socket(family, SOCK_DGRAM, 0));
    MUST(bind(fd, (void *)address, *length));
    MUST(getsockname(fd, (void *)address, length));
    return fd;
}

static void exchange(int family) {
    struct sockaddr_storage one, two, from;
    socklen_t length, size;
    char buffer[70000];
    printf("== IPv%d\n", family == AF_INET ? 4 : 6);
    int first = open_on(family, &one, &length), second = open_on(family, &two, &length);

    section("datagrams");
    CALL(sendto(first, "hello", 5, 0, (void *)&two, length));
    CALL(sendto(first, "world!", 6, 0, (void *)&two, length));
    CALL(sendto(first, "", 0, 0, (void *)&two, length));
    size = sizeof from;
    CALL(recvfrom(second, buffer, sizeof buffer, 0, (void *)&from, &size));
    SHOW(size == length && memcmp(&from, &one, length) == 0);
    CALL(recvfrom(second, buffer, 3, MSG_PEEK, NULL, NULL));
    CALL(recvfrom(second, buffer, 3, MSG_TRUNC, NULL, NULL));
    CALL(recvfrom(second, buffer, sizeof buffer, 0, NULL, NULL));
    CALL(recvfrom(second, buffer, sizeof buffer, MSG_DONTWAIT, NULL, NULL));
    struct pollfd entry = {second, POLLIN | POLLOUT, 0};
    CALL(poll(&entry, 1, 0));
    SHOW(entry.revents);

    section("messages");
    struct iovec vectors[2] = {{"ab", 2}, {"cde", 3}};
    struct msghdr message = {.msg_name = &two, .msg_namelen = length, .msg_iov = vectors, .msg_iovlen = 2};
    CALL(sendmsg(first, &message, 0));
    struct iovec into = {buffer, 4};
    message = (struct msghdr){.msg_name = &from, .msg_namelen = sizeof from, .msg_iov = &into, .msg_iovlen = 1};
    CALL(recvmsg(second, &message, 0));
    SHOW(message.msg_flags == MSG_TRUNC);
    SHOW(message.msg_namelen == length);
    struct mmsghdr many[3] = {0};
    for (int i = 0; i < 3; i++)
        many[i].msg_hdr = (struct msghdr){.msg_name = &two, .msg_namelen = length, .msg_iov = vectors, .msg_iovlen = 1 + (i & 1)};
    CALL(sendmmsg(first, many, 3, 0));
    SHOW(many[1].msg_len);
    struct mmsghdr got[4] = {0};
    struct iovec places[4];
    for (int i = 0; i < 4; i++) {
        places[i] = (struct iovec){buffer + i * 100, 100};
        got[i].msg_hdr = (struct msghdr){.msg_iov = &places[i], .msg_iovlen = 1};
    }
    CALL(recvmmsg(second, got, 4, MSG_DONTWAIT, NULL));
    SHOW(got[0].msg_len + got[1].msg_len + got[2].msg_len);

    section("large");
    memset(buffer, 'x', sizeof buffer);
    CALL(sendto(first, buffer, 60000, 0, (void *)&two, length));
    CALL(recvfrom(second, buffer, sizeof buffer, 0, NULL, NULL));
    CALL(sendto(first, buffer, 65536, 0, (void *)&two, length));

    section("connected");
    CALL(connect(first, (void *)&two, length));
    CALL(send(first, "direct", 6, 0));
    CALL(read(second, buffer, sizeof buffer));
    CALL(sendto(second, "answer", 6, 0, (void *)&one, length));
    CALL(read(first, buffer, sizeof buffer));
    int stranger = open_on(family, &from, &length);
    CALL(sendto(stranger, "stranger", 8, 0, (void *)&one, length));
    CALL(recv(first, buffer, sizeof buffer, MSG_DONTWAIT));
    size = sizeof from;
    CALL(getpeername(first, (void *)&from, &size));
    CALL(memcmp(&from, &two, length));
    CALL(connect(first, &(struct sockaddr){.sa_family = AF_UNSPEC}, sizeof(struct sockaddr)));
    CALL(getpeername(first, (void *)&from, &size));
    CALL(send(first, "x", 1, 0));

    section("nobody there");
    MUST(connect(stranger, (void *)&two, length));
    close(second);
    CALL(send(stranger, "x", 1, 0));
    entry = (struct pollfd){stranger, POLLIN, 0};
    CALL(poll(&entry, 1, 2000));
    CALL(recv(stranger, buffer, 1, MSG_DONTWAIT));
    CALL(recv(stranger, buffer, 1, MSG_DONTWAIT));

    section("in use");
    int holder = open_on(family, &one, &length);
    int other = MUST(socket(family, SOCK_DGRAM, 0));
    CALL(bind(other, (void *)&one, length));
    CALL(bind(holder, (void *)&one, length));
    CALL(listen(holder, 1));
    CALL(accept(holder, NULL, NULL));
    int available = -1;
    sendto(other, "1234567", 7, 0, (void *)&one, length);
    CALL(ioctl(holder, FIONREAD, &available));
    SHOW(available);
    struct timeval brief = {0, 20000};
    CALL(setsockopt(other, SOL_SOCKET, SO_RCVTIMEO, &brief, sizeof brief));
    int64_t before = now(CLOCK_MONOTONIC);
    CALL(recv(other, buffer, 1, 0));
    SHOW(now(CLOCK_MONOTONIC) - before >= 20 * MILLISECOND);
    close(first), close(other), close(stranger), close(holder);
}

int main(void) {
    exchange(AF_INET);
    exchange(AF_INET6);
    return finish();
}
