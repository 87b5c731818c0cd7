/*
 * bare SOCKET IMAGE POLL_US: the yardstick of `python -m bench.ceiling`, a server with nothing but what is measured.
 *
 * It has one thread and two commands, READ and WRITE, and takes its clients at their word: never serve anyone else with
 * it. A turn receives once for each connection that has sent something, moves data between the file and the buffers in
 * place, and sends the replies together; long data is sent from the mapped file as it lies there, as nbdimg does. For
 * POLL_US behind a request it polls its sockets instead of sleeping.
 *
 * Spec: proto.md "Fixed newstyle negotiation", "Request message", "Simple reply message".
 */
#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum {
    KIB = 1024,
    CONNECTIONS_MAX = 16,
    PAYLOAD_MAX = 4096 * KIB,   /* more than any cell asks for */
    RECEIVE_MAX = 256 * KIB,    /* in one call, if no long payload is under way: stays in the processor's cache */
    CARRIED_MAX = 16 * KIB,     /* of a payload that is received together with what follows it, as nbdimg's */
    SEND_MAX = 256 * KIB,       /* of gathered replies; a longer one goes alone */
    MAPPED_FROM = 64 * KIB,     /* of data that is sent from the file as it lies in memory, as nbdimg's */
    WRITE_BURST = 8,            /* replies to writes that are gathered, as nbdimg's: the client goes on meanwhile */
    SOCKET_BUFFER = 1024 * KIB, /* as nbdimg's */
};
enum { FIXED_NEWSTYLE = 1, NO_ZEROES = 2, HAS_FLAGS = 1, CAN_MULTI_CONN = 256 };
enum { OPT_INFO = 6, OPT_GO = 7, REP_ACK = 1, REP_INFO = 3 };
enum { CMD_READ = 0, CMD_WRITE = 1, NBD_EIO = 5 };
#define NBDMAGIC UINT64_C(0x4e42444d41474943)
#define IHAVEOPT UINT64_C(0x49484156454f5054)
#define OPTION_REPLY_MAGIC UINT64_C(0x3e889045565a9)
#define SIMPLE_REPLY_MAGIC 0x67446698
#define REP_ERR_UNSUP 0x80000001

#pragma pack(push, 1)
struct greeting { uint64_t magic, option_magic; uint16_t flags; };
struct option { uint64_t magic; uint32_t number, length; };
struct option_reply { uint64_t magic; uint32_t number, kind, length; };
struct info_export { uint16_t kind; uint64_t size; uint16_t flags; };
struct request { uint32_t magic; uint16_t flags, command; uint64_t cookie, offset; uint32_t length; };
struct reply { uint32_t magic, error; uint64_t cookie; };
#pragma pack(pop)

/* From start to end: what was received and not answered, or answered and not sent; what is mapped comes behind it. */
struct buffer {
    size_t start, end;
    struct iovec mapped;
    char data[sizeof(struct request) + PAYLOAD_MAX + RECEIVE_MAX];
};
struct connection { bool is_behind; struct buffer in, out; }; /* behind: requests wait until `out` is sent */

static int image;
static char *map; /* of it */

static bool receive_all(int fd, void *data, size_t length)
{
    return !length || recv(fd, data, length, MSG_WAITALL) == (ssize_t)length;
}

static void answer_option(int fd, uint32_t number, uint32_t kind, const void *data, uint32_t length)
{
    struct option_reply head = { htobe64(OPTION_REPLY_MAGIC), number, htobe32(kind), htobe32(length) };
    send(fd, &head, sizeof head, MSG_NOSIGNAL);
    send(fd, data, length, MSG_NOSIGNAL);
}

/* Refuses every option but what asks for the export, until it is to be used. False: the client left. */
static bool shake_hands(int fd)
{
    struct stat status;
    fstat(image, &status);
    struct greeting greeting = { htobe64(NBDMAGIC), htobe64(IHAVEOPT), htobe16(FIXED_NEWSTYLE | NO_ZEROES) };
    struct info_export info = { 0, htobe64(status.st_size), htobe16(HAS_FLAGS | CAN_MULTI_CONN) };
    struct option option;
    uint32_t flags;
    char data[64 * KIB];
    send(fd, &greeting, sizeof greeting, MSG_NOSIGNAL);
    bool is_there = receive_all(fd, &flags, sizeof flags);
    while (is_there && receive_all(fd, &option, sizeof option)) {
        bool is_go = be32toh(option.number) == OPT_GO;
        bool is_known = is_go || be32toh(option.number) == OPT_INFO;
        is_there = be32toh(option.length) <= sizeof data && receive_all(fd, data, be32toh(option.length));
        if (is_known)
            answer_option(fd, option.number, REP_INFO, &info, sizeof info);
        answer_option(fd, option.number, is_known ? REP_ACK : REP_ERR_UNSUP, "", 0);
        if (is_go)
            return is_there;
    }
    return false;
}

/* Receives once, no further than to the end of a long payload that is under way. False: the client left. */
static bool receive(struct buffer *in, int fd)
{
    size_t wanted = RECEIVE_MAX;
    in->end -= in->start;
    memmove(in->data, in->data + in->start, in->end);
    in->start = 0;
    if (in->end >= sizeof(struct request)) {
        struct request *request = (struct request *)in->data;
        size_t missing = sizeof *request + be32toh(request->length) - in->end;
        if (missing > CARRIED_MAX)
            wanted = missing;
    }
    ssize_t count = recv(fd, in->data + in->end, wanted, MSG_DONTWAIT);
    if (count > 0)
        in->end += count;
    return count > 0 || (count < 0 && errno == EAGAIN);
}

/* Lays the replies to complete requests into `out`. False: it disconnects, or is not understood. */
static bool answer(struct connection *client)
{
    struct buffer *in = &client->in, *out = &client->out;
    int burst = 0;
    client->is_behind = false;
    while (in->end - in->start >= sizeof(struct request)) {
        struct request *request = (struct request *)(in->data + in->start);
        struct reply *reply = (struct reply *)(out->data + out->end);
        uint16_t command = be16toh(request->command);
        size_t length = be32toh(request->length), taken = sizeof *request, given = sizeof *reply;
        if (command > CMD_WRITE || length > PAYLOAD_MAX)
            return false;
        *(command == CMD_WRITE ? &taken : &given) += length;
        if (in->end - in->start < taken)
            break;
        bool is_mapped = command == CMD_READ && length >= MAPPED_FROM;
        client->is_behind = burst == WRITE_BURST || out->mapped.iov_len || (out->end && out->end + given > SEND_MAX);
        if (client->is_behind)
            break;
        ssize_t moved = length;
        if (is_mapped)
            out->mapped = (struct iovec) { map + be64toh(request->offset), length };
        else if (command == CMD_READ)
            moved = pread(image, reply + 1, length, be64toh(request->offset));
        else
            moved = pwrite(image, request + 1, length, be64toh(request->offset));
        reply->magic = htobe32(SIMPLE_REPLY_MAGIC);
        reply->error = moved == (ssize_t)length ? 0 : htobe32(NBD_EIO);
        reply->cookie = request->cookie;
        burst += command == CMD_WRITE;
        in->start += taken;
        out->end += reply->error || is_mapped ? sizeof *reply : given;
    }
    return true;
}

/* Sends what the socket takes. False: something is left. */
static bool send_replies(struct buffer *out, int fd)
{
    size_t length = out->end - out->start;
    if (length + out->mapped.iov_len) {
        struct iovec parts[] = { { out->data + out->start, length }, out->mapped };
        const struct msghdr message = { .msg_iov = parts, .msg_iovlen = 2 };
        ssize_t count = sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (count < 0)
            count = errno == EAGAIN ? 0 : length + out->mapped.iov_len; /* it is gone, as `receive` will tell */
        size_t first = (size_t)count < length ? (size_t)count : length;
        out->start += first;
        out->mapped.iov_base = (char *)out->mapped.iov_base + (count - first);
        out->mapped.iov_len -= count - first;
        if (out->start < out->end || out->mapped.iov_len)
            return false;
    }
    out->start = out->end = 0;
    return true;
}

/* A turn. What to wait for before the next one, or 0: the client left. */
static short serve(struct connection *client, int fd)
{
    if (!send_replies(&client->out, fd))
        return POLLOUT;
    do {
        if ((!client->is_behind && !receive(&client->in, fd)) || !answer(client))
            return 0;
        if (!send_replies(&client->out, fd))
            return POLLOUT;
    } while (client->is_behind);
    return POLLIN;
}

static void welcome(struct pollfd *slot, struct connection *client, int fd)
{
    const int size = SOCKET_BUFFER;
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof size); /* beyond net.core.wmem_max, where it is allowed */
    *slot = (struct pollfd) { fd, POLLIN, 0 };
    client->in.start = client->in.end = client->out.start = client->out.end = client->is_behind = 0;
    client->out.mapped.iov_len = 0;
    if (!shake_hands(fd)) {
        close(fd);
        slot->fd = -1;
    }
}

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

int main(int argc, char **argv)
{
    static struct pollfd polls[1 + CONNECTIONS_MAX]; /* the listener, then as `clients`; fd is -1 where there is none */
    static struct connection clients[1 + CONNECTIONS_MAX];
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    for (int index = 0; index <= CONNECTIONS_MAX; index++)
        polls[index] = (struct pollfd) { -1, POLLIN, 0 };
    if (argc != 4 || strlen(argv[1]) >= sizeof address.sun_path || (image = open(argv[2], O_RDWR)) < 0)
        return 2;
    map = mmap(NULL, lseek(image, 0, SEEK_END), PROT_READ, MAP_SHARED, image, 0);
    if (map == MAP_FAILED)
        return 2;
    strcpy(address.sun_path, argv[1]);
    polls[0].fd = socket(AF_UNIX, SOCK_STREAM, 0);
    if (bind(polls[0].fd, (struct sockaddr *)&address, sizeof address) || listen(polls[0].fd, CONNECTIONS_MAX))
        return 2;
    const int64_t window_ns = INT64_C(1000) * atoi(argv[3]);
    for (int64_t touched_ns = 0;;) {
        if (!poll(polls, 1 + CONNECTIONS_MAX, now_ns() - touched_ns < window_ns ? 0 : -1)) {
            sched_yield();
            continue;
        }
        touched_ns = now_ns();
        int free_index = 0;
        for (int index = 1; index <= CONNECTIONS_MAX; index++) {
            struct pollfd *slot = &polls[index];
            if (slot->revents && !(slot->events = serve(&clients[index], slot->fd))) {
                close(slot->fd);
                slot->fd = -1;
            }
            if (slot->fd < 0)
                free_index = index;
        }
        if (polls[0].revents && free_index)
            welcome(&polls[free_index], &clients[free_index], accept(polls[0].fd, NULL, NULL));
    }
}
